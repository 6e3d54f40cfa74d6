"""From hub ids, folders and single files into memory."""
