"""Data quality by hand: masks for personal data, quality rules, duplicate lines, near-duplicate documents."""
