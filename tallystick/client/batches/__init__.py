"""Files and batches of requests, kept on this machine. May import `sdk` and below; the gateway has the routes.

Pure: `records`, `input_lines`, `upload_form`, `window`, `output_lines`. I/O: `sealed_stream`, `file_store`, `store`. `runner`
runs batches and `validation` checks their input; how a line is answered comes from outside (`ports`).
"""
