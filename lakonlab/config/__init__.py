"""Reading config files and checking them before anything heavy starts."""
