"""Other APIs than OpenAI's chat, translated to it and back. Pure. Imports the client's `openai` room and `protocol` alone."""
