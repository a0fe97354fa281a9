"""Pages for browsers, as all daemons serve them: templates, styles, the headers that keep pages strict, static files.

Pages need no script to be read; scripts are modules of their own files. It imports protocol, chain, runtime and Jinja, never a
side.
"""
