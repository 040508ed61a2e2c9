"""Who makes data: behaviour policies, the recorder, and the recipes of our data sets."""
