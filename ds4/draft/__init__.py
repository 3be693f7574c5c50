"""Drafters for speculative decoding, and how long a draft should be."""
