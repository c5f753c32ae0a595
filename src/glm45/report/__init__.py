"""From a run folder to one HTML page with plots."""
