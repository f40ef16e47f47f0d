"""Several recipes trained side by side on one text, with what is equal said and the rest shown."""
