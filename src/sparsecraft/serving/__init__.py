"""A converted model in use: answers to prompts and chats.

It knows checkpoints and tokenizers, and neither training nor conversion.
"""
