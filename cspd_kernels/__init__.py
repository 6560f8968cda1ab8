from .schedule import Schedule
