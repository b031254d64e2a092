"""What several tests share: small models, texts, workloads, and changes to files."""
