"""All words that a reader of results reads: findings, answers, the page, titles of plots, the terminal, comparisons.

No other module of `reporting` holds a sentence.
"""
