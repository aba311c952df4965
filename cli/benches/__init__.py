"""What `./tessera bench` measures, one file per measurement, and what they share."""
