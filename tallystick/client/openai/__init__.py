"""What OpenAI's wire format says: requests, event streams, message texts. Imports nothing of the client."""
