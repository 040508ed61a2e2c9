"""Making data: behaviour policies, the recorder, and the recipes of the data sets."""
