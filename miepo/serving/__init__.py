"""A trained policy over HTTP: ``miepo serve``, an OpenAI-compatible endpoint whose requests carry a preference."""
