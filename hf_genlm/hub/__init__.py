"""Publishing on the Hub: upload manifest, push, Trainer callback."""
