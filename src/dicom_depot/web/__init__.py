"""The HTTP face of the service: routes, bodies and status codes. No rule of the domain lives here."""
