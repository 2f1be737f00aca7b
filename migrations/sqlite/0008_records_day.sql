-- Nothing looks records up by their day, and each one written paid for it.
drop index records_day;
