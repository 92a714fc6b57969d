//! `tandem certificates`: makes a cluster's authority and the certificates of its nodes and controllers.

use super::CliError;
use super::output::Output;
use crate::tls::{
    AUTHORITY, AUTHORITY_KEY, Address, Authority, CERTIFICATE, IssueError, KEY, Leaf, Name, Role, Validity,
};
use serde::Serialize;
use std::path::PathBuf;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Days that an authority is valid: replacing it touches every node.
const AUTHORITY_DAYS: u16 = 3650;
/// Days that a certificate is valid: it cannot be revoked, so it ends.
const CERTIFICATE_DAYS: u16 = 365;

/// Certificates: by them the machines of a cluster know each other.
///
/// Make the authority once, then a certificate for each machine:
///
///   tandem certificates init --dir authority --cluster lab
///
///   tandem certificates issue --dir authority --role node --name node-1 --out node-1
///
/// Copy the directory node-1 to that machine. The authority's key stays where it is: whoever has it can be anybody in
/// the cluster.
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Make the authority of a new cluster.
    Init(InitArguments),
    /// Make the certificate of a node or a controller.
    ///
    /// To renew one, make it again in another directory, and put the new files in the place of the old ones.
    Issue(IssueArguments),
}

#[derive(Debug, clap::Args)]
pub struct InitArguments {
    /// Where the authority is kept; made if need be.
    #[arg(long, env = "TANDEM_AUTHORITY_DIR", value_name = "DIR")]
    dir: PathBuf,
    /// What people call the cluster.
    #[arg(long, env = "TANDEM_CLUSTER", value_name = "NAME", default_value = "tandem")]
    cluster: Name,
    /// How long it is valid.
    #[arg(long, env = "TANDEM_AUTHORITY_DAYS", value_name = "DAYS", default_value_t = AUTHORITY_DAYS, value_parser = clap::value_parser!(u16).range(1..=36500))]
    days: u16,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, clap::Args)]
pub struct IssueArguments {
    /// Where the authority is kept.
    #[arg(long, env = "TANDEM_AUTHORITY_DIR", value_name = "DIR")]
    dir: PathBuf,
    /// What the holder is.
    #[arg(long, env = "TANDEM_ROLE", value_enum)]
    role: Role,
    /// What the holder is called: for a node, the name of the machine in the cluster.
    #[arg(long, env = "TANDEM_NAME")]
    name: Name,
    /// A host name or IP address of the holder, for clients that check it; may be repeated.
    #[arg(long = "address", env = "TANDEM_ADDRESSES", value_delimiter = ',', value_name = "ADDRESS")]
    addresses: Vec<Address>,
    /// Where to write tls.crt, tls.key and ca.crt; made if need be.
    #[arg(long, env = "TANDEM_OUT", value_name = "DIR")]
    out: PathBuf,
    /// How long it is valid.
    #[arg(long, env = "TANDEM_CERTIFICATE_DAYS", value_name = "DAYS", default_value_t = CERTIFICATE_DAYS, value_parser = clap::value_parser!(u16).range(1..=36500))]
    days: u16,
    #[command(flatten)]
    output: Output,
}

/// What was made, for people and scripts.
#[derive(Serialize)]
struct Made {
    cluster_id: String,
    role: String,
    name: String,
    addresses: Vec<String>,
    valid_until: String,
    certificate: PathBuf,
    key: PathBuf,
}

/// Does one of them.
pub fn run(command: Command) -> Result<(), CliError> {
    match command {
        Command::Init(arguments) => init(arguments),
        Command::Issue(arguments) => issue(arguments),
    }
}

fn init(InitArguments { dir, cluster, days, output }: InitArguments) -> Result<(), CliError> {
    let validity = Validity::days(days);
    let authority = Authority::create(&dir, cluster, validity)?;
    let made = Made {
        cluster_id: authority.cluster().to_string(),
        role: "authority".into(),
        name: authority.name().to_string(),
        addresses: Vec::new(),
        valid_until: date(validity.until)?,
        certificate: dir.join(AUTHORITY),
        key: dir.join(AUTHORITY_KEY),
    };
    show(&made, output)
}

fn issue(arguments: IssueArguments) -> Result<(), CliError> {
    let IssueArguments { dir, role, name, addresses, out, days, output } = arguments;
    let validity = Validity::days(days);
    let leaf = Leaf { role, name, addresses };
    let issued = Authority::open(&dir)?.issue(&leaf, validity)?;
    issued.write(&out).map_err(IssueError::from)?;
    let made = Made {
        cluster_id: issued.identity.cluster.to_string(),
        role: issued.identity.role.to_string(),
        name: issued.identity.name.to_string(),
        addresses: leaf.addresses.iter().map(Address::to_string).collect(),
        valid_until: date(validity.until)?,
        certificate: out.join(CERTIFICATE),
        key: out.join(KEY),
    };
    show(&made, output)
}

fn show(made: &Made, output: Output) -> Result<(), CliError> {
    let mut lines = vec![
        ("Cluster", made.cluster_id.clone()),
        ("Role", made.role.clone()),
        ("Name", made.name.clone()),
        ("Valid until", made.valid_until.clone()),
        ("Certificate", made.certificate.display().to_string()),
        ("Key", made.key.display().to_string()),
    ];
    if !made.addresses.is_empty() {
        lines.insert(3, ("Addresses", made.addresses.join(", ")));
    }
    output.one(made, &lines)
}

fn date(at: OffsetDateTime) -> Result<String, CliError> {
    at.truncate_to_second().format(&Rfc3339).map_err(|error| CliError::Output(std::io::Error::other(error)))
}
