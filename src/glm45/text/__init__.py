"""Between messages and token ids: tokenizer, special tokens, chat renderer, output parser."""
