"""Ray at the edge: session and token, shares of the resources found, deadlines."""

import os

# Ray reads this when it is first imported, so it must be set before: token authentication is always on.
os.environ.setdefault("RAY_AUTH_MODE", "token")
