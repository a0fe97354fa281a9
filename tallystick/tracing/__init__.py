"""Traces of jobs for OpenTelemetry: settings, the spans that all sides write, and their export.

Only `otlp` and `application` import OpenTelemetry, and only if tracing is on. The room may import `protocol`. Pure rooms do not
import it.
"""
