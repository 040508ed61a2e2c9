"""The fast paths of the networks, behind one interface."""
