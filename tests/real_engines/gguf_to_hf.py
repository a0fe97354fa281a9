"""Converts a GGUF file to a folder that transformers can serve: FILE FOLDER. Runs under that engine's Python."""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer  # type: ignore[import-not-found]

file, folder = Path(sys.argv[1]), sys.argv[2]
loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
config = loaded.config
del config.quantization_config
model = AutoModelForCausalLM.from_config(config)
model.load_state_dict(loaded.state_dict())
tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
model.save_pretrained(folder)
tokenizer.save_pretrained(folder)
