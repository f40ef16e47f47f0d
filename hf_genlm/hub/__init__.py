"""Publishing on the Hub: manifest, upload, clean load, Trainer callback."""
