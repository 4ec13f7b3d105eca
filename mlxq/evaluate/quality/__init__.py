"""How good models are on a text: perplexity, and how far their predictions are from a reference's."""
