"""The process around the market: config, keystores, logs, storage, HTTP serving. Imports only tallystick.protocol."""
