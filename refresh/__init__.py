"""The domain: deciding, scanning, refreshing, delivering.

Takes values and a connection; imports no Celery, no FastAPI and no Click, and reads no clock: every instant is the
database's `now()` or a value that the caller gives.
"""
