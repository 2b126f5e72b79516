"""From a prompt to an answer: sampling, generation, saved caches.

Nothing is imported here: take what you need from its module.
"""
