"""The node: a provider's daemon that sells the output of an inference engine."""
