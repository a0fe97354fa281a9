"""The protocol that client, coordinator and node share: messages, wire formats, prices and errors. Imports no other room."""
