"""Bookkeeping shared by every trained method: the generator of steps, schedules, the device."""
