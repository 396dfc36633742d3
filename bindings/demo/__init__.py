"""`hftcore demo`: a small real model aligned, attacked and repaired."""
