"""Ray at the edge: session and auth, shares of the resources found, deadlines, the versioned weight store."""

import os

# Ray reads this when it is first imported, so it must be set before: token authentication is always on.
os.environ.setdefault("RAY_AUTH_MODE", "token")
