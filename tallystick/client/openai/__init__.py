"""OpenAI's API as the client reads and renders it: requests, answers, errors. Imports no other room of the client."""
