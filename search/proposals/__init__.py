"""Where to look next: samplers that propose points."""
