"""What `import dreamteacher` offers: verbs with keywords, what they return, and parts for a notebook."""
