"""What executes notebooks, keeps their results fresh, and reports them on one page."""

import sys

sys.modules.setdefault("rfc3987_syntax", None)  # nbformat's jsonschema would make a grammar of it, for seconds
