mod codec;
mod line;
mod loopback;
mod refusals;
mod samples;
