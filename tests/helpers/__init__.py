"""What several test files share: random models, small runs, commands in this process."""
