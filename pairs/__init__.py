"""Training sets of edited pairs from a table of prompts: `python pairs make TABLE --out DIR`."""
