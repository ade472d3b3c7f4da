"""How the bundled stand-ins are made."""
