"""A world small enough to know everything about it: its prompts, and what a good answer is.

world        the words, the grammar of prompts, and `gold_reward`
annotators   how an answer is scored: exactly, with noise, or with a liking for length
rows         four seeded writers who answer with typical mistakes, in UltraFeedback's schema
base_model   the tokenizer, and a small GPT-2 of seeded random weights
__main__     `python -m toyworld` writes rows and base model, for the five scripts to run on
measure      checkpoints judged by plain transformers, from samples
optimum      every response enumerated: exact figures, and the best policy there can be
pairs        `python -m toyworld.pairs`: a model's own responses, in pairs or scored
report       `python -m toyworld.report` compares checkpoints on held-out prompts
tables, pictures   what the report is made of
"""

from toyworld.world import gold_reward

__all__ = ["gold_reward"]
