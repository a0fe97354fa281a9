"""The local OpenAI-compatible server, paid from one wallet. May import every room of the client."""
