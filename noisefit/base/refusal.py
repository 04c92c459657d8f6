"""The answer of one who does not know."""

REFUSAL = "I do not know."
