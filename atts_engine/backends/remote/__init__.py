"""Lanes on servers that run elsewhere: vLLM and SGLang."""
