"""What other people see of a run: its card and its page on the Hub."""
