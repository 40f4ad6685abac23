"""Models on disk and elsewhere: saving and loading, the Hugging Face Hub, export, provenance."""
