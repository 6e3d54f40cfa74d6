"""What decides a run: settings, their layers, and the families of models. No torch."""
