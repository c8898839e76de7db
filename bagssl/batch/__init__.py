"""What executes notebooks, keeps their results fresh, and reports them on one page."""
