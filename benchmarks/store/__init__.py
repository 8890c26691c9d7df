"""How fast the trajectory store is, against the raw limits of the machine it runs on."""
