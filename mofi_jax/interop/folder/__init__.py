"""The files of a Hugging Face folder that know nothing of our models."""
